"""Pictures and exact masks from the simulator."""
