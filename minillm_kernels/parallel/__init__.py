"""A vocabulary whose columns are split over the ranks of a process group: the row operations over all of them."""
