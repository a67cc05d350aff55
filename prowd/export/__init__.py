"""`prowd export`: a run's model as a packed file and as ONNX."""
