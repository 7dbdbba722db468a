"""Signals, files, the processor and connections between processes.

Only paddle_import and paddle_internals need Paddle. Programs import this room first: it hides warnings
of Paddle that a user can do nothing about.
"""
import warnings

for _message in (
        'No ccache found',                                    # by each import of Paddle
        'When training, we now always track',                 # by each batch norm in each step
        'Your model will be trained under CPUONLY mode'):     # the log says it
    warnings.filterwarnings('ignore', message=_message)
