"""Verification and identification with an embedded set: scores, metrics, figures and the report page.

faces        embed.py           features of each face, once; features.py: which of them are compared
pairs        scoring.py         scores; verification.py and uncertainty.py: what they say, and how surely;
                                run.py: its stage; extra.py: more sets of them
strangers    identification.py  MegaFace; identify.py: its stage; noise.py: what it leaves out
overlap      leaks.py           people who are trained on; audit.py: what the model suspects
pages        figures.py         curves; report.py: the page; record.py: what MLflow gets
other models models.py          of any kind; suite.py: by all protocols; foreign.py: embeddings from elsewhere
two runs     comparison.py      which is better
photographs  photographs.py     of one's own; verify.py: two of them
"""
