"""`python -m ops` compiles the fused operator and says where it lies."""
import sys

from ops.build import BuildError, library

try:
    print(library())
except (BuildError, OSError) as error:
    sys.exit(f'ops: {error}')
