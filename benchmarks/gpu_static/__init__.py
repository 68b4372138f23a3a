"""What compiled GPU kernels cost, counted without a GPU: registers, spills, instructions of the main loop a column."""
