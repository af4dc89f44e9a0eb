"""The data sets, one file each: `scenes.py` defines one `DataSource` named "scenes" (docs/add-data.md)."""
