"""What distracts: videos, camera, colours, and the named sets of them for evaluation."""
