"""The report: from the records of finished runs to tables, plots and a page. It never needs a model."""
