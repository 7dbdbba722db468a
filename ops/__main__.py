"""`python -m ops` compiles the fused operators and says where they lie."""
import sys

from ops.build import BuildError, library

try:
    print(library())
except (BuildError, OSError) as error:
    sys.exit(f'ops: {error}')
