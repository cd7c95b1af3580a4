"""The model: built without weights, adapted, filled from its checkpoint, and its loss."""
