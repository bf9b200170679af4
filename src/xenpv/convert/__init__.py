"""Converting save files between versions, widths and toolstacks."""
