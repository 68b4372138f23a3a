"""What runs amount to: text on the terminal (summary.py). Nothing here trains."""
