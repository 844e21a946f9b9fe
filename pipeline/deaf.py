"""Imported, it makes a process deaf to signals that ask to end: for one that another ends when it does.

Such a signal may be sent to all processes of a training at once. It is for the one that trains, which still needs those
that make its batches.
"""

import signal

for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
