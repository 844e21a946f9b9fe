"""train: shards become a face-verification model, by the Large Margin Cosine Loss.

batches       loader.py     decoded and augmented ahead: sampling.py which, cache.py whence, faces.py, augment.py
the model     model.py      pixels to an embedding, by one of backbones.py
the loss      heads.py      LMCL and the others
iterations    loop.py       schedule.py the rate, validation.py the judge, meter.py the speed
several       ranks.py      what processes do together; launch.py starts them
interruption  checkpoint.py
the outcome   export.py     ONNX; sheet.py faces as the network sees them
the stage     run.py
"""
