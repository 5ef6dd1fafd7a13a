"""The attention core on split heads: `attention`, what its arguments mean, and which back end serves a call."""
