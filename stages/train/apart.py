"""What the process imports that those are forked off which make batches: the loader, once for all of them.

A signal that asks a training to end may be sent to all of its processes. It is for the one that trains, which still
needs batches and ends the others itself.
"""

import signal

import stages.train.loader  # noqa: F401

signal.signal(signal.SIGTERM, signal.SIG_IGN)
