"""The accuracy of results on rows like a trained model's, against float64: `python -m bench accuracy`."""
