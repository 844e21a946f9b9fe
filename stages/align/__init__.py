"""align: photographs become aligned faces, the five landmarks of each where the template has them.

bytes         decode.py   pixels, or why there are none
pixels        faces.py     the faces in them, and which one counts (mtcnn.py, area.py, nms.py: the detector)
landmarks     warp.py     the aligned face
earlier runs  earlier.py  what need not be done again
the outcome   page.py     counts, rejections, and a page to look at
the stage     run.py
"""
