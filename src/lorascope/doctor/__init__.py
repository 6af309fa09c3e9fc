"""What is right and what is wrong on this machine: each fast path against the plain one."""
