"""What training steps cost on TPUs, read off programs that were compiled without one."""
