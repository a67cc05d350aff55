"""What every floor above needs: settings, bit-widths, seeds, errors, files, devices."""
