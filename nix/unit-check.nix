# systemd has nothing to say against the rendered units, and finds them as closed as promised.
{
  pkgs,
  package,
  rendered,
}:
let
  inherit (pkgs) lib;
  inherit (rendered) configurations;

  # systemd-analyze's exposure, times ten
  bounds = {
    plain = 11;
    other-port = 11;
    restricted = 13;
  };

  lay =
    name:
    lib.concatMapAttrsStringSep "\n" (
      path: text: "install -Dm644 ${builtins.toFile (baseNameOf path) text} ${name}/${path}"
    ) configurations.${name};
in
assert !rendered.acceptsStorePath;
pkgs.runCommand "codex-responses-proxy-unit"
  {
    nativeBuildInputs = [ pkgs.systemd ];
    # the text names it, but has lost the context that would bring it along
    inherit package;
    passthru.rendered = configurations;
  }
  (
    lib.concatMapAttrsStringSep "\n" (name: bound: ''
      echo ${name}:
      ${lay name}
      systemd-analyze verify --man=no --recursive-errors=no ${name}/etc/systemd/system/*
      systemd-analyze security --no-pager --offline=true --threshold=${toString bound} \
        ${name}/etc/systemd/system/codex-responses-proxy.service >${name}.txt || { cat ${name}.txt; exit 1; }
      tail -n 1 ${name}.txt
    '') bounds
    + "touch $out\n"
  )
