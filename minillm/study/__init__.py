"""A study: methods × student sizes × seeds, and ablations, in cells that are run one at a time (recipes/study/).

plan.py says which cells there are and what each runs, cell.py runs one and writes its JSON, document.py makes the page
from the JSON of those that are done.
"""
