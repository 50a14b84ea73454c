"""From settings to Kubernetes manifests, and whether manifests are right; touches no cluster."""
