"""What lets other people's code run on the fused core without a change."""
