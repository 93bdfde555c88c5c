"""The fault programme: `cases.py` has its table, `lab.py` the small runs that are broken."""
