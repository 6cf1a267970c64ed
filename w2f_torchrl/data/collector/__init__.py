"""TorchRL's collectors, set up for a recurrent policy, and resumable between two batches."""
