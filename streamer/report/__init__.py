"""Make reports for people: findings and measurements as a page or figures, and the fate of intruders between two findings."""
