"""The report of a run: `page` puts it together, `checklist` has its rows, a template its looks."""
