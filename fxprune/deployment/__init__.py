"""To an ONNX file that onnxruntime was seen to run right."""
