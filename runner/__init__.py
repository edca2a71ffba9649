"""One run: the pair, the experiments chosen, the batch, the folder it leaves behind."""
