"""What Xen's public headers say: data, no behaviour; one declaration for both guest widths."""
