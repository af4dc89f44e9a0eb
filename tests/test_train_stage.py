"""The stage that trains a row: what it refuses names the row, the option and the fix."""

from pathlib import Path

import pytest

from tcbench.config.load import load_suite
from tcbench.errors import UserError
from tcbench.stages.train import train_row

SMOKE = Path(__file__).parent / "smoke.yaml"


def test_what_training_refuses_names_the_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = SMOKE.read_text()
    assert "beta: -2000}, paper" in text
    config = tmp_path / "flat.yaml"
    config.write_text(
        text.replace("options: {num_full_steps: 2, beta: -2000}", "options: {num_full_steps: 2, beta: -1}")
    )
    entry = load_suite(config)["nfe4-tokencache"]
    with pytest.raises(
        UserError, match=r"^row nfe4-tokencache: predictor: alpha-bar is flat.*set schedule: even"
    ) as caught:
        train_row(entry)
    assert "\n" not in str(caught.value) and not (entry.trained / "artefacts.json").exists()
