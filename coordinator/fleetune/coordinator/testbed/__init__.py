"""Unequal devices on one machine: namespaces with links of their own, and quotas of processor and memory."""
