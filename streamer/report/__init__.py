"""A report for people: what was found and measured, as a page or as figures, and what became of intruders between two findings."""
