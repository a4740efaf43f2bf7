"""Make reports for people: findings and measurements as a page, and the fate of intruders between two findings."""
