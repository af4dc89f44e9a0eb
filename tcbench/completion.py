"""Completion for shells, made of the commands: sub-commands, their options, names of suites, models, methods."""

import argparse
from collections.abc import Mapping

from tcbench.models.specs import MODELS
from tcbench.outside.places import suite_files
from tcbench.registry import method_names

_BASH = """\
_tcbench() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} words
    case $COMP_CWORD in 1) words="{commands}" ;; *) case ${{COMP_WORDS[1]}} in
{options}
        esac
        case $before in
            --model) words="{models}" ;;
            --method|--like) words="{methods}" ;;
            --suite|--config) words="{suites}" ;;
        esac ;;
    esac
    COMPREPLY=($(compgen -W "$words" -- "$word") $(compgen -f -- "$word"))
}}
complete -o filenames -F _tcbench tcbench"""


def script(shell: str, commands: Mapping[str, argparse.ArgumentParser]) -> str:
    """What a shell evaluates, `bash` or `zsh`, which reads bash's.

    Args:
        commands: the parsers of the sub-commands by name.
    """
    suites = " ".join(sorted(suite_files()))
    lines = []
    for name, parser in commands.items():
        words = [option for action in parser._actions for option in action.option_strings if option.startswith("--")]
        positional = [action for action in parser._actions if not action.option_strings]
        words += [str(choice) for action in positional for choice in action.choices or ()]
        if any(action.metavar == "SUITE" for action in positional):
            words.append(suites)
        if name == "methods":
            words += method_names()
        lines.append(f'        {name}) words="{" ".join(words)}" ;;')
    bash = _BASH.format(
        commands=" ".join(commands),
        options="\n".join(lines),
        models=" ".join(MODELS),
        methods=" ".join(method_names()),
        suites=suites,
    )
    return bash if shell == "bash" else f"autoload -U +X bashcompinit && bashcompinit\n{bash}"
