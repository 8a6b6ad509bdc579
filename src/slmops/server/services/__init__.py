"""What the control plane does, without knowing how it is stored or asked."""
