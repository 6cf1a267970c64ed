"""Evaluations on recorded episodes that were not trained on."""
