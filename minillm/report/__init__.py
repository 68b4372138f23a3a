"""What runs amount to: text on the terminal (summary.py), and a page of tables and figures (page.py, from read.py and
figures.py). Nothing here trains or evaluates."""
