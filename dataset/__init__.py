"""数据：从文本文件到词元张量。  Data: from text files to token tensors."""
