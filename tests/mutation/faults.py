"""The faults of `run.py`: a text that is once in a file, what takes its place, and the tests that should notice."""

import core_faults
import cuda_faults
import module_faults
import parallel_faults

FAULTS = [*core_faults.FAULTS, *module_faults.FAULTS, *cuda_faults.FAULTS, *parallel_faults.FAULTS]
