"""download: photographs from anywhere become data/raw, a table of their untouched bytes.

an address      fetch.py          a file on this machine, checked
a file, folder  archives.py       a stream of members: name and bytes
a name          layouts.py        image, identity, video and frame
a pair list     protocols.py      pairs of images or videos
a seed          synthetic.py      photographs of procedural faces
the stage       run.py
"""
