"""What a run shows, from its folder's files alone: page.py the report, plots.py its figures."""
