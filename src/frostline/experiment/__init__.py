"""Experiments: claims that are measured, the demo, the report. Read `claims.py`, then `report.py`."""
