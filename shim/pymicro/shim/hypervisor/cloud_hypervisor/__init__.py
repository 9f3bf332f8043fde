"""The Cloud Hypervisor backend; see backend."""
