-- MEDS 0.3 and 0.4 (subject_id, time, code, numeric_value; the columns beside them may be absent) to the tables that
-- prepare_data.py works on. `event` has a row an event, `code_table` what metadata/codes.parquet says of the codes.

CREATE TABLE moments AS
SELECT subject_id AS client, wall(time) AS time, code, regexp_extract(upper(code), '^[A-Z_]+') AS kind, hadm_id,
       row_number() OVER (ORDER BY subject_id, wall(time), code) AS number
FROM event
WHERE regexp_matches(upper(code), '^(HOSPITAL_ADMISSION|HOSPITAL_DISCHARGE|ADMISSION|DISCHARGE|VISIT_START|VISIT_END|ICU_ADMISSION|ICU_DISCHARGE|ED_REGISTRATION|MEDS_DEATH|MEDS_BIRTH|GENDER|SEX)(//|$)');

-- An admission lasts until the next discharge of the same subject. It starts with the registration in the emergency
-- department, if that comes after the discharge before.
CREATE TABLE stays_told AS
SELECT a.client, a.hadm_id, a.time AS admitted,
       (SELECT min(d.time) FROM moments d WHERE d.client = a.client AND d.time >= a.time
           AND d.kind IN ('HOSPITAL_DISCHARGE', 'DISCHARGE', 'VISIT_END')) AS discharged,
       (SELECT max(d.time) FROM moments d WHERE d.client = a.client AND d.time < a.time
           AND d.kind IN ('HOSPITAL_DISCHARGE', 'DISCHARGE', 'VISIT_END')) AS before
FROM moments a WHERE a.kind IN ('HOSPITAL_ADMISSION', 'ADMISSION', 'VISIT_START');

CREATE TABLE visits AS
SELECT coalesce(s.hadm_id, concat(s.client, '-', strftime(s.admitted, '%Y%m%dT%H%M%S'))) AS visit_id, s.client,
       least(s.admitted, coalesce(
           (SELECT max(e.time) FROM moments e WHERE e.client = s.client AND e.kind = 'ED_REGISTRATION'
               AND e.time <= s.admitted AND e.time > coalesce(s.before, '-infinity'::TIMESTAMP)
               AND e.time >= s.admitted - INTERVAL 3 DAY), s.admitted)) AS visit_start,
       s.discharged AS visit_end,
       EXISTS (SELECT 1 FROM moments d WHERE d.client = s.client AND (
           d.kind = 'MEDS_DEATH' AND d.time::DATE BETWEEN s.admitted::DATE AND s.discharged::DATE
           OR d.time = s.discharged AND regexp_matches(upper(d.code), '//(DIED|DEAD|EXPIRED)$'))) AS died
FROM stays_told s
QUALIFY row_number() OVER (PARTITION BY s.client, s.admitted ORDER BY s.hadm_id) = 1;

CREATE TABLE icu_stays AS
SELECT concat(i.client, '-icu-', strftime(i.time, '%Y%m%dT%H%M%S')) AS stay_id, v.visit_id, i.client, i.time AS stay_start,
       (SELECT min(d.time) FROM moments d WHERE d.client = i.client AND d.time > i.time AND d.kind = 'ICU_DISCHARGE')
       AS stay_end
FROM moments i LEFT JOIN visits v ON v.client = i.client AND i.time BETWEEN v.visit_start AND v.visit_end
WHERE i.kind = 'ICU_ADMISSION';

-- LAB//50912//mg/dL is item and unit, UNK is no unit; LOINC//8867-4 is a code of LOINC; any other code stays as it is.
CREATE MACRO parts(c) AS regexp_extract(c, '^(LAB|VITAL|VITALS|SUBJECT_FLUID_OUTPUT)//(RESULT//)?([^/]+)(//(.*))?$',
                                        ['kind', 'result', 'item', 'tail', 'unit']);

CREATE TABLE codes_read AS
SELECT code, CASE WHEN code LIKE 'LOINC//%' THEN split_part(code, '//', 2)
                  WHEN parts(code).item <> '' THEN parts(code).item ELSE code END AS own,
       CASE WHEN parts(code).unit NOT IN ('', 'UNK') THEN parts(code).unit END AS unit,
       parts(code).kind = 'SUBJECT_FLUID_OUTPUT' AS output
FROM (SELECT DISTINCT code FROM event);

-- Events that can be no observation, such as diagnoses and orders, are no rows.
CREATE VIEW source_rows AS
SELECT e.hadm_id AS visit_id, e.subject_id AS client, wall(e.time) AS charted, c.own AS code, e.text_value AS value,
       e.numeric_value AS number, coalesce(e.unit, c.unit) AS unit
FROM event e JOIN codes_read c USING (code)
WHERE e.time IS NOT NULL AND NOT regexp_matches(e.code,
    '^(HOSPITAL_|ICU_|ED_|MEDS_|DIAGNOSIS|PROCEDURE|DRG|HCPCS|TRANSFER_TO|MEDICATION|INFUSION_|GENDER|SEX|RACE|INSURANCE)');

CREATE TABLE code_names AS
SELECT c.own AS code, any_value(t.description ORDER BY t.description) AS name
FROM codes_read c JOIN code_table t USING (code) WHERE t.description <> '' GROUP BY c.own;

CREATE TABLE patients_known AS
SELECT client, max(year(time)) FILTER (kind = 'MEDS_BIRTH') AS birth_year,
       max(split_part(code, '//', 2)) FILTER (kind IN ('GENDER', 'SEX')) AS sex
FROM moments GROUP BY client;

-- MEDICATION//START//drug is an order, MEDICATION//drug//Administered is a dose. An infusion is told by its item only.
CREATE TABLE antibiotics AS
SELECT e.subject_id AS client, v.visit_id, s.stay_id, wall(e.time) AS start, NULL::TIMESTAMP AS stop,
       CASE WHEN split_part(e.code, '//', 2) = 'START' THEN split_part(e.code, '//', 3)
            ELSE split_part(e.code, '//', 2) END AS name,
       e.route, split_part(e.code, '//', 2) <> 'START' AS administered,
       coalesce(e.order_id, e.poe_id, e.emar_id) AS order_id
FROM event e
LEFT JOIN visits v ON v.client = e.subject_id AND wall(e.time) BETWEEN v.visit_start AND v.visit_end
LEFT JOIN icu_stays s ON s.visit_id = v.visit_id AND wall(e.time) >= s.stay_start AND wall(e.time) < s.stay_end
WHERE e.code LIKE 'MEDICATION//%' AND split_part(e.code, '//', 2) <> 'STOP'
  AND (split_part(e.code, '//', 2) = 'START' OR given(split_part(e.code, '//', -1)));

CREATE TABLE cultures AS
SELECT e.subject_id AS client, v.visit_id, wall(e.time) AS time, true AS has_time, t.name AS specimen,
       regexp_matches(lower(concat(t.name, e.code)), 'blood') AS blood, false AS positive,
       concat(e.subject_id, ' ', e.time, ' ', e.code) AS culture_id
FROM event e LEFT JOIN (SELECT code, any_value(description ORDER BY description) AS name FROM code_table GROUP BY code) t
       USING (code)
LEFT JOIN visits v ON v.client = e.subject_id AND wall(e.time) BETWEEN v.visit_start AND v.visit_end
WHERE regexp_matches(lower(concat(e.code, ' ', t.name)), 'cultur') AND NOT regexp_matches(e.code, '//END//')
GROUP BY ALL;

-- The rate of an infusion is its numeric_value; which unit it has is not told, so that it is unknown.
CREATE TABLE vasopressors AS
SELECT e.subject_id AS client, v.visit_id, wall(e.time) AS start,
       (SELECT min(wall(x.time)) FROM event x WHERE x.subject_id = e.subject_id AND wall(x.time) > wall(e.time)
           AND x.code = replace(e.code, 'INFUSION_START', 'INFUSION_END')) AS stop,
       pressor(t.description) AS drug, CASE WHEN e.unit IS NOT NULL THEN per_kg(try_cast(e.numeric_value AS DOUBLE), e.unit, NULL) END AS rate
FROM event e JOIN code_table t USING (code)
LEFT JOIN visits v ON v.client = e.subject_id AND wall(e.time) BETWEEN v.visit_start AND v.visit_end
WHERE e.code LIKE 'INFUSION_START//%' AND pressor(t.description) IS NOT NULL;

CREATE TABLE urine AS
SELECT e.subject_id AS client, v.visit_id, wall(e.time) AS time, try_cast(e.numeric_value AS DOUBLE) AS volume
FROM event e JOIN codes_read c USING (code) LEFT JOIN code_names n ON n.code = c.own
LEFT JOIN visits v ON v.client = e.subject_id AND wall(e.time) BETWEEN v.visit_start AND v.visit_end
WHERE c.output AND lower(c.unit) = 'ml' AND (is_urine(n.name) OR c.own IN
    ('226559', '226560', '226561', '226584', '226563', '226564', '226565', '226567', '226557', '226558', '227489'));
