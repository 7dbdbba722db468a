"""`python -m ops` compiles the operators, for the device that Paddle takes, and says where they lie."""
import sys

from ops.build import BuildError, gpu_arch, library

try:
    print(library(gpu_arch()))
except (BuildError, OSError) as error:
    sys.exit(f'ops: {error}')
