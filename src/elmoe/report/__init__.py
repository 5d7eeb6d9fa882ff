"""Result files to tables, verdicts on claims and one HTML page with interactive plots."""
