"""Time, memory and error of the fused losses beside other libraries and the bare GEMMs."""
