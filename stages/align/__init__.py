"""align: photographs become aligned faces, the five landmarks of each where the template has them.

bytes         decode.py   pixels, or why there are none
pixels        faces.py    the faces in them, and which one counts
landmarks     warp.py     the aligned face
earlier runs  earlier.py  what need not be done again
the outcome   page.py     counts, rejections, and a page to look at
the stage     run.py

The detector of faces.py: mtcnn.py is the cascade, nms.py its suppression of overlapping boxes, area.py what its
networks look at, networks.py the networks, which networks_compiled.py computes on a CPU and networks_torch.py on a GPU.
What takes the time on a CPU is in kernels.cpp.
"""
