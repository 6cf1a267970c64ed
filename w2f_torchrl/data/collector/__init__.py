"""TorchRL's collectors for a recurrent policy, resumable between two batches."""
