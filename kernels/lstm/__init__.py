"""The diagonal and the Row LSTM: a scan over the image in one launch."""
