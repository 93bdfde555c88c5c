"""Fault injection: `cases.py` has the table of cases, `lab.py` the small runs that they break."""
